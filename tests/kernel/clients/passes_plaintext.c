/* Has functions like SSL_read and SSL_write, which pass what the test says: no TLS at all.
 *
 *   passes_plaintext HOST    then, a line of standard input each: SENT|RECEIVED, in C escapes of \r\n
 */
#include <stdio.h>
#include <string.h>

#define KEPT __attribute__((noinline, noclone, used, visibility("default")))

static char incoming[4096];
static int connections[64]; /* their addresses are the connections' */

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
	int *ssl = connections;

	puts("up");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		line[strcspn(line, "\n")] = 0;
		char *sent = strtok(line, "|"), *received = strtok(NULL, "|");
		pass_host(ssl, arguments[count - 1]);
		strcpy(incoming, unescaped(received));
		sent = unescaped(sent);
		pass_out(ssl, sent, strlen(sent));
		pass_in(ssl++, buffer, sizeof(buffer));
		puts("done");
		fflush(stdout);
	}
	return 0;
}
