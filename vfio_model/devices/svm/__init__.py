"""svm: a device that shares the address space of a process."""
