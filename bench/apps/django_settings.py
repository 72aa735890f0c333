"""The settings that `django-admin startproject` writes, for production."""

import os
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict
from site_of_items.settings import *  # noqa: F403

url = conninfo_to_dict(os.environ["DATABASE_URL"])
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "django_urls"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url["dbname"],
        "USER": url["user"],
        "PASSWORD": url["password"],
        "HOST": url["host"],
        "PORT": url["port"],
        "OPTIONS": {"pool": True},
    }
}
TEMPLATES[0]["DIRS"] = [Path(__file__).parent]  # noqa: F405
