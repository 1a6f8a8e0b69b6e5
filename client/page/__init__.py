"""The hospital's own page, on this machine only: what left here, what is asked next (docs/hospital-page.md)."""
