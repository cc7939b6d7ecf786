"""Converters from public sets' own metadata to manifests."""
