"""Raw data to .beton files with manifests."""
