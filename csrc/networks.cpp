// The differentiable sorting networks on the CPU.
