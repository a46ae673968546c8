"""e1000: Intel's 82540EM Gigabit Ethernet controller, which QEMU calls e1000."""
