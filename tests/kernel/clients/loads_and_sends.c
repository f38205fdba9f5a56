/* Loads the libssl it is told to, and sends a request as soon as it can.
 *
 *   loads_and_sends LIBSSL PORT HOST
 */
#include <arpa/inet.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define FUNCTION(result, name, ...) result (*name)(__VA_ARGS__) = dlsym(libssl, #name)

int main(int count, char **arguments)
{
	if (count != 4)
		return 1;
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(atoi(arguments[2]))};
	int socket_fd = socket(AF_INET, SOCK_STREAM, 0);
	inet_aton("127.0.0.1", &at.sin_addr);
	if (connect(socket_fd, (struct sockaddr *)&at, sizeof(at)))
		return 2;
	void *libssl = dlopen(arguments[1], RTLD_NOW);
	if (!libssl)
		return 3;
	FUNCTION(void *, TLS_client_method, void);
	FUNCTION(void *, SSL_CTX_new, void *);
	FUNCTION(void *, SSL_new, void *);
	FUNCTION(int, SSL_set_fd, void *, int);
	FUNCTION(long, SSL_ctrl, void *, int, long, void *);
	FUNCTION(int, SSL_connect, void *);
	FUNCTION(int, SSL_write, void *, const void *, int);
	FUNCTION(int, SSL_read, void *, void *, int);
	FUNCTION(void, SSL_free, void *);
	void *ssl = SSL_new(SSL_CTX_new(TLS_client_method()));
	char text[512];
	SSL_set_fd(ssl, socket_fd);
	SSL_ctrl(ssl, 55 /* SSL_CTRL_SET_TLSEXT_HOSTNAME */, 0, arguments[3]);
	if (SSL_connect(ssl) != 1)
		return 4;
	int length = snprintf(text, sizeof(text), "GET /close/100 HTTP/1.1\r\nHost: %s\r\n\r\n", arguments[3]);
	if (SSL_write(ssl, text, length) != length)
		return 5;
	while (SSL_read(ssl, text, sizeof(text)) > 0)
		;
	SSL_free(ssl);
	return 0;
}
