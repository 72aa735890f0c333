{% include 'notes/' ~ ('plain' if cookiecutter.worker == 'none' else 'with_task') ~ '.py' -%}
