"""What development needs and production never imports."""
