# One request to Anthropic as it goes over TLS, with $BODY, and a moment in which to be answered.
printf 'POST /v1/messages HTTP/1.1\r\nHost: api.anthropic.com\r\nContent-Type: application/json\r\n'
printf 'Content-Length: %d\r\nConnection: close\r\n\r\n' "$(stat -c %s "$BODY")"
cat "$BODY"
sleep 1
