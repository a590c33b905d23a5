"""What norms cost on an H100 and on TPUs, read from programs that are compiled without one."""
