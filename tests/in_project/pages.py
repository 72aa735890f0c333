"""The application of the reload tests, with a page."""

from .core.reload_app import app

__all__ = ["app"]


@app.get("/page")
def page() -> str:
    return "<h1>Page</h1>"
