"""Keep rows by conditions over their columns: the expressions, presets with their sources, and the HTML report."""
