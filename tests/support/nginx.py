"""What an nginx that a test starts is configured with."""

from __future__ import annotations

import shutil

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
# In the foreground, with all that it writes in ``{folder}``; what it serves goes in the place of INSIDE.
INSIDE = "{inside}"
CONFIG = """
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  {inside}
}}
"""
