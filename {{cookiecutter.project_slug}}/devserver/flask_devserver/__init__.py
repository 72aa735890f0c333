"""A development server for any Flask application, and a PostgreSQL for it."""
