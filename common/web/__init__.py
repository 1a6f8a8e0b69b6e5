"""What the coordinator's console and the hospital's page share: one look, one guard, pages rendered on the server."""
