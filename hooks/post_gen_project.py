"""Say what to type next."""

print("""
Done. To see it run:

    cd {{ cookiecutter.project_slug }}
    uv run flask dev

and open http://127.0.0.1:5000/. README.md tells the rest.""")
