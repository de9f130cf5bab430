"""Read and write images, label maps and tables; files are written completely or not at all."""
