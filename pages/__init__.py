"""Static pages: speech to listen to, units and runs to look at, ratings to ask for. No server, nothing fetched, no framework."""
