{% include 'pool/' ~ cookiecutter.pool ~ '.py' -%}
