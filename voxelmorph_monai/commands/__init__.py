"""The commands of ``vxm``: their arguments, and the functions in ``apps`` that they call."""
