"""How the server is watched: series for Prometheus, rates for people who look, spans for a trace store."""
