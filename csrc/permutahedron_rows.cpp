// The vector loops of soft sort and soft rank, compiled once per instruction set.
