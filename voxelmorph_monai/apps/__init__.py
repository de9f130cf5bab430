"""What ``vxm`` does, one module a command."""
