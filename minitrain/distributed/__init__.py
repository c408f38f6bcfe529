"""Devices and processes: one device or FSDP2, a watchdog, and how a process ends."""
