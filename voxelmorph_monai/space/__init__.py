"""Scans in physical space (RAS, mm): their position, resampling and alignment."""
