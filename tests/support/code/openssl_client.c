/* A TLS client with OpenSSL in it: asks a server on this machine some times, each on a connection.
 *
 *     openssl_client HOST PATH BODY TIMES plain|ex
 *
 * It connects to 127.0.0.1:443, names HOST in the handshake, trusts what SSL_CERT_FILE says, and
 * prints the status of each answer. `ex` uses SSL_read_ex and SSL_write_ex.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static int connected(void)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(443)};
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	return fd >= 0 && !connect(fd, (void *)&address, sizeof(address)) ? fd : -1;
}

static int say(SSL *ssl, const char *text, int length, int ex)
{
	size_t written = 0;

	if (ex)
		return SSL_write_ex(ssl, text, (size_t)length, &written) && written == (size_t)length;
	return SSL_write(ssl, text, length) == length;
}

static int hear(SSL *ssl, char *buffer, int length, int ex)
{
	size_t got = 0;

	if (ex)
		return SSL_read_ex(ssl, buffer, (size_t)length, &got) ? (int)got : -1;
	return SSL_read(ssl, buffer, length);
}

static int ask(SSL_CTX *context, char **arguments, int ex)
{
	static char request[65536], answer[65536];
	int length = snprintf(request, sizeof(request),
			      "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"
			      "Connection: close\r\nContent-Length: %zu\r\n\r\n%s",
			      arguments[2], arguments[1], strlen(arguments[3]), arguments[3]);
	SSL *ssl = SSL_new(context);
	int fd = connected(), first = 0, got;

	if (fd < 0 || length >= (int)sizeof(request) || !SSL_set_fd(ssl, fd) ||
	    !SSL_set_tlsext_host_name(ssl, arguments[1]) || SSL_connect(ssl) != 1 ||
	    !say(ssl, request, length, ex))
		return 0;
	while ((got = hear(ssl, answer, sizeof(answer), ex)) > 0) {
		if (!first && got > 12)
			first = atoi(answer + 9);
	}
	SSL_shutdown(ssl);
	SSL_free(ssl);
	close(fd);
	printf("%d\n", first);
	return first;
}

int main(int count, char **arguments)
{
	SSL_CTX *context = SSL_CTX_new(TLS_client_method());

	if (count != 6 || !context || !SSL_CTX_set_default_verify_paths(context))
		return 2;
	SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
	for (int times = atoi(arguments[4]); times > 0; times--)
		if (!ask(context, arguments, !strcmp(arguments[5], "ex")))
			return 1;
	return 0;
}
