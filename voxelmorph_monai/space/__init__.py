"""Where scans lie: RAS, mm; how they are resampled and aligned."""
