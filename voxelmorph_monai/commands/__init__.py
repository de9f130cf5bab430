"""The commands of ``vxm``: what each takes, and the app that it calls."""
