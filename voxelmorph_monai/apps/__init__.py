"""The work of the commands of ``vxm``, usually one module per command."""
