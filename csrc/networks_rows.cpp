// The vector loops of differentiable sorting networks, compiled once per instruction set.
