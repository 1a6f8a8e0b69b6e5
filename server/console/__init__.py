"""The coordinator's console: a web application over a consortium's folder (docs/console.md)."""
