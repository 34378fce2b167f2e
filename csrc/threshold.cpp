// The sparsemax and entmax on the CPU.
