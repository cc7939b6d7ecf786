"""Several runs trained and compared under equal conditions."""
