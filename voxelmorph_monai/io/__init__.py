"""Images, label maps and tables in files, written completely or not at all."""
