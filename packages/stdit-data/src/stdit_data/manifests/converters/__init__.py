"""Convert the metadata of known data sets to manifests."""
