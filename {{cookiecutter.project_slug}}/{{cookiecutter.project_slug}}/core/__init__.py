{% include 'core/' ~ cookiecutter.worker ~ '.py' -%}
