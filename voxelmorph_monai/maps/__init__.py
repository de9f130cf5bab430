"""Maps between scans, in memory, as ITK transforms and in files; and moving points, surfaces and streamlines."""
