"""Files on disks and in stores, by path or URL."""
