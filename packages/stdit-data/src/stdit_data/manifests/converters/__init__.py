"""Converters from public data sets' own metadata to manifests."""
