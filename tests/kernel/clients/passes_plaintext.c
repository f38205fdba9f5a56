/* Has functions like SSL_read and SSL_write, which pass what the test says: no TLS at all.
 *
 *   passes_plaintext HOST    then, a line of standard input each: SENT|RECEIVED, in C escapes of \r\n,
 *                            and, if need be, |NAMED|KEPT: the name that is told to pass_host (-: it
 *                            is not called), and the one that a pointer in the object leads to
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KEPT __attribute__((noinline, noclone, used, visibility("default")))

static char incoming[4096];
/* Their addresses are the connections'. */
static struct connection {
	void *before[331], *name, *after[400];
} connections[64];

KEPT int pass_host(void *ssl, const char *name)
{
	asm volatile("" : : "r"(ssl), "r"(name) : "memory");
	return 1;
}

KEPT int pass_out(void *ssl, const void *data, int length)
{
	asm volatile("" : : "r"(ssl), "r"(data) : "memory");
	return length;
}

KEPT int pass_in(void *ssl, void *data, int length)
{
	int count = strlen(incoming);
	asm volatile("" : : "r"(ssl) : "memory");
	memcpy(data, incoming, count < length ? count : length);
	return count;
}

static char *unescaped(char *text)
{
	char *to = text;
	for (char *at = text; *at; at++, to++) {
		*to = *at;
		if (*at == '\\')
			*to = *++at == 'r' ? '\r' : '\n';
	}
	*to = 0;
	return text;
}

int main(int count, char **arguments)
{
	char line[4096], buffer[4096];
	struct connection *ssl = connections;

	puts("up");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		line[strcspn(line, "\n")] = 0;
		char *sent = strtok(line, "|"), *received = strtok(NULL, "|");
		char *named = strtok(NULL, "|"), *kept = strtok(NULL, "|");
		named = named ? named : arguments[count - 1];
		if (strcmp(named, "-"))
			pass_host(ssl, named);
		ssl->name = strdup(kept ? kept : named);
		strcpy(incoming, unescaped(received));
		sent = unescaped(sent);
		pass_out(ssl, sent, strlen(sent));
		pass_in(ssl++, buffer, sizeof(buffer));
		puts("done");
		fflush(stdout);
	}
	return 0;
}
