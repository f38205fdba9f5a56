"""COUNT requests on one handle of a libcurl: `libcurl.py LIBRARY URL CA COUNT 1.1|2 BODY`."""

import ctypes
import sys

library, url, authority, count, version, body = sys.argv[1:]
POSTFIELDS, URL, CAINFO, HTTPHEADER, HTTP_VERSION = 10015, 10002, 10065, 10023, 84

curl = ctypes.CDLL(library)
curl.curl_easy_init.restype = curl.curl_slist_append.restype = ctypes.c_void_p
handle = ctypes.c_void_p(curl.curl_easy_init())
headers = ctypes.c_void_p(curl.curl_slist_append(None, b"content-type: application/json"))


def set_option(number: int, value: object) -> None:
    assert curl.curl_easy_setopt(handle, number, value) == 0


set_option(URL, url.encode())
set_option(CAINFO, authority.encode())
set_option(POSTFIELDS, body.encode())
set_option(HTTPHEADER, headers)
set_option(HTTP_VERSION, ctypes.c_long({"1.1": 2, "2": 4}[version]))
for _ in range(int(count)):
    assert curl.curl_easy_perform(handle) == 0
curl.curl_easy_cleanup(handle)
