// The LapSum on the CPU.
