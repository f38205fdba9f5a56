/* One request through mbedTLS, or wolfSSL where WOLFSSL is defined: speaks HOST CA BODY. */
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

static int connected(const char *host)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
	if (getaddrinfo(host, "443", &hints, &found))
		exit(2);
	int fd = socket(found->ai_family, SOCK_STREAM, 0);
	if (connect(fd, found->ai_addr, found->ai_addrlen))
		exit(3);
	return fd;
}

#ifdef USE_WOLFSSL
#include <wolfssl/options.h>
#include <wolfssl/ssl.h>

static WOLFSSL *ssl;

static int begin(const char *host, const char *authority)
{
	wolfSSL_Init();
	WOLFSSL_CTX *context = wolfSSL_CTX_new(wolfTLSv1_2_client_method());
	wolfSSL_CTX_load_verify_locations(context, authority, 0);
	ssl = wolfSSL_new(context);
	wolfSSL_UseSNI(ssl, WOLFSSL_SNI_HOST_NAME, host, strlen(host));
	wolfSSL_set_fd(ssl, connected(host));
	return wolfSSL_connect(ssl) == SSL_SUCCESS;
}

#define put(data, length) wolfSSL_write(ssl, data, length)
#define get(data, length) wolfSSL_read(ssl, data, length)
#define end() wolfSSL_free(ssl)
#else
#include <mbedtls/ctr_drbg.h>
#include <mbedtls/entropy.h>
#include <mbedtls/net_sockets.h>
#include <mbedtls/ssl.h>

static mbedtls_ssl_context ssl;
static mbedtls_ssl_config config;
static mbedtls_x509_crt roots;
static mbedtls_entropy_context entropy;
static mbedtls_ctr_drbg_context random_numbers;
static mbedtls_net_context net;

static int begin(const char *host, const char *authority)
{
	mbedtls_ssl_init(&ssl);
	mbedtls_ssl_config_init(&config);
	mbedtls_x509_crt_init(&roots);
	mbedtls_entropy_init(&entropy);
	mbedtls_ctr_drbg_init(&random_numbers);
	mbedtls_ctr_drbg_seed(&random_numbers, mbedtls_entropy_func, &entropy, 0, 0);
	mbedtls_x509_crt_parse_file(&roots, authority);
	mbedtls_ssl_config_defaults(&config, MBEDTLS_SSL_IS_CLIENT, MBEDTLS_SSL_TRANSPORT_STREAM,
				    MBEDTLS_SSL_PRESET_DEFAULT);
	mbedtls_ssl_conf_ca_chain(&config, &roots, 0);
	mbedtls_ssl_conf_rng(&config, mbedtls_ctr_drbg_random, &random_numbers);
	mbedtls_ssl_setup(&ssl, &config);
	mbedtls_ssl_set_hostname(&ssl, host);
	net.fd = connected(host);
	mbedtls_ssl_set_bio(&ssl, &net, mbedtls_net_send, mbedtls_net_recv, 0);
	return mbedtls_ssl_handshake(&ssl) == 0;
}

#define put(data, length) mbedtls_ssl_write(&ssl, (const unsigned char *)(data), length)
#define get(data, length) mbedtls_ssl_read(&ssl, (unsigned char *)(data), length)
#define end() mbedtls_ssl_free(&ssl)
#endif

int main(int count, char **arguments)
{
	static char text[1 << 16];

	if (count != 4 || !begin(arguments[1], arguments[2]))
		return 4;
	int length = snprintf(text, sizeof(text),
			      "POST /v1/messages HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"
			      "Content-Length: %zu\r\nConnection: close\r\n\r\n%s",
			      arguments[1], strlen(arguments[3]), arguments[3]);
	if (put(text, length) != length)
		return 5;
	while (get(text, sizeof(text)) > 0)
		;
	end();
	return 0;
}
