FLASK_APP={{ cookiecutter.project_slug }}
{%- if cookiecutter.worker in ('procrastinate', 'celery') %}
FLASK_DEV_WITH=worker
{%- endif %}
