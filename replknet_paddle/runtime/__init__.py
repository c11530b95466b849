"""What everything else stands on: errors, files, processes, launching, and the compiler driver."""
