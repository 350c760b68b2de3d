"""django-oauth-toolkit for the tests: python tests/django_server.py USERNAME PASSWORD

In: the name and the password of its user. It keeps its data in memory, and ends when stdin does.
Out: one line of JSON, once it listens: for its client, the variables for sipgate_oauth.py.
"""

# Django and its packages have no types.
# mypy: disable-error-code="import-untyped"

import json
import sys
import threading

import django
from django.apps import apps
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.management import call_command
from django.core.wsgi import get_wsgi_application
from django.urls import include, path
from waitress import create_server

CLIENT = {"client_id": "example", "client_secret": "sCCCCCCC-as-long-as-HS256-wants-it"}
APPS = ["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"]
APPS += ["oauth2_provider"]
# Django has the login form, but no page for it.
LOGIN_PAGE = '<form method="post">{% csrf_token %}{{ form }}<button>Log in</button></form>'
LOADERS = [
    ("django.template.loaders.locmem.Loader", {"registration/login.html": LOGIN_PAGE}),
    "django.template.loaders.app_directories.Loader",
]
TEMPLATES = "django.template.backends.django.DjangoTemplates"
MEMORY = "file:tests?mode=memory&cache=shared"  # shared by the threads of this process

settings.configure(
    SECRET_KEY="signs the cookies",
    ALLOWED_HOSTS=["127.0.0.1"],
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=APPS,
    MIDDLEWARE=[
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",  # redirects to an address with a final slash
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
    ],
    TEMPLATES=[{"BACKEND": TEMPLATES, "OPTIONS": {"loaders": LOADERS}}],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": MEMORY}},
    MIGRATION_MODULES=dict.fromkeys(app.split(".")[-1] for app in APPS),  # no history of tables
    PASSWORD_HASHERS=["django.contrib.auth.hashers.MD5PasswordHasher"],  # others are slow by design
    OAUTH2_PROVIDER={"OIDC_ENABLED": True, "SCOPES": {"openid": "Know who you are"}},
)
django.setup()
urlpatterns = [
    path("accounts/", include("django.contrib.auth.urls")),
    path("o/", include("oauth2_provider.urls")),
]

call_command("migrate", run_syncdb=True, verbosity=0)
get_user_model().objects.create_user(sys.argv[1], password=sys.argv[2])
apps.get_model("oauth2_provider", "Application").objects.create(
    **CLIENT,
    client_type="confidential",
    authorization_grant_type="authorization-code",
    redirect_uris="http://127.0.0.1/oauth",  # for a loopback address, this means any port
    algorithm="HS256",  # the secret signs the ID token, so it can't be kept as a hash
    hash_client_secret=False,
)
# One thread is enough, and two would lock each other out of SQLite's shared memory.
server = create_server(get_wsgi_application(), host="127.0.0.1", port=0, threads=1)
threading.Thread(target=server.run, daemon=True).start()
url = f"http://127.0.0.1:{server.effective_port}/o"
variables = {
    "CLIENT_ID": CLIENT["client_id"],
    "CLIENT_SECRET": CLIENT["client_secret"],
    "OAUTH_SCOPE": "openid",
    "AUTH_URL": f"{url}/authorize/",
    "TOKEN_URL": f"{url}/token/",
    "TEST_API_ENDPOINT": f"{url}/userinfo/",
}
print(json.dumps({CLIENT["client_id"]: variables}), flush=True)
sys.stdin.read()
