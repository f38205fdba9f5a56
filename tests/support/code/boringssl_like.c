/* A stand-in for BoringSSL's ssl_lib.cc: which functions report which errors, whom they call and
 * what they write. Compiled by test_boringssl.py with symbols, searched without them.
 *
 * Switches make what a finder must refuse: TWO_WRITERS, BAD_LENGTH, NO_CALLER, PEEK_WRITES; and
 * what it must see through: NO_PEEK, CHECKED (as with libc++'s hardening, SSL_read ends in a call
 * that never returns), OLD (out of memory was reported until 2023), BAD_LENGTH=194 (until 2021
 * SSL_write told of a shutdown instead) or 0 (then of neither for a while), PEEK_APART (GCC does not inline SSL_peek). */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#ifndef BAD_LENGTH
#define BAD_LENGTH 111
#endif
#define REPORT(reason) ERR_put_error(16, 0, reason, FILE_NAME, __LINE__)
#ifndef FILE_NAME
#define FILE_NAME "/build/third_party/boringssl/ssl/ssl_lib.cc"
#endif
#define OUT __attribute__((noinline)) __attribute__((visibility("default")))
#define INSIDE __attribute__((noinline)) __attribute__((visibility("hidden")))
#define ALWAYS static inline __attribute__((always_inline))

struct method {
    char is_dtls;
    int (*open)(void *, unsigned char *, size_t);
    int (*write_app_data)(void *, char *, size_t *, const void *, size_t);
};
struct state {
    int error;
    const unsigned char *pending;
    size_t pending_bytes;
    unsigned short buffered;
    unsigned char *buffer;
    unsigned flags;
};
struct ssl {
    const struct method *method;
    int (*do_handshake)(struct ssl *);
    struct state *state;
    void *quic;
    char *hostname;
};

struct { int library, reason; const char *file; unsigned line; } volatile last;

INSIDE void ERR_put_error(int library, int unused, int reason, const char *file, unsigned line) {
    last.library = library + unused;
    last.reason = reason;
    last.file = file;
    last.line = line;
}
/* Other libraries report too, so that a compiler cannot fold the arguments into the callee. */
OUT void *OPENSSL_malloc(size_t size, int library) {
    void *data = malloc(size);
    if (data == NULL)
        ERR_put_error(library, (int)size, 65, "/build/third_party/boringssl/crypto/mem.cc", 200);
    return data;
}
INSIDE void ERR_clear_error(void) { last.reason = 0; }
INSIDE int SSL_do_handshake(struct ssl *ssl) {
    if (ssl->do_handshake == NULL) {
        REPORT(144);
        return -1;
    }
    return ssl->do_handshake(ssl);
}
ALWAYS void reset(struct ssl *ssl) {
    ssl->state->error = 0;
    ERR_clear_error();
}

INSIDE int ssl_read_impl(struct ssl *ssl) {
    reset(ssl);
    if (ssl->do_handshake == NULL) {
        REPORT(226);
        return -1;
    }
    while (ssl->state->pending_bytes == 0) {
        while (!(ssl->state->flags & 8)) {
            int ret = SSL_do_handshake(ssl);
            if (ret < 0)
                return ret;
            if (ret == 0) {
                REPORT(215);
                return -1;
            }
        }
        int opened = ssl->method->open(ssl, ssl->state->buffer, ssl->state->buffered);
        if (opened <= 0)
            return opened;
    }
    return 1;
}

ALWAYS int peek(struct ssl *ssl, void *buf, int num) {
    if (ssl->quic != NULL) {
        REPORT(66);
        return -1;
    }
    int ret = ssl_read_impl(ssl);
    if (ret <= 0)
        return ret;
    if (num <= 0)
        return num;
    size_t todo = ssl->state->pending_bytes < (size_t)num ? ssl->state->pending_bytes : (size_t)num;
    memcpy(buf, ssl->state->pending, todo);
#ifdef PEEK_WRITES
    ssl->state->flags |= 1;
#endif
    return (int)todo;
}
#ifndef NO_PEEK
OUT int SSL_peek(struct ssl *ssl, void *buf, int num) { return peek(ssl, buf, num); }
#endif
#ifdef PEEK_APART
#define peek SSL_peek
#endif
#ifdef TWO_READERS
OUT int SSL_read_early(struct ssl *ssl, void *buf, int num) {
    int ret = peek(ssl, buf, num);
    if (ret > 0)
        ssl->state->flags |= 32;
    return ret;
}
#endif
#ifdef PEEKS_LATER /* what calls SSL_peek with other arguments, and writes, is not SSL_read */
OUT int BIO_pending(struct ssl *ssl, void *buf, int num) {
    int ret = peek(ssl, ssl->state->buffer, 1);
    ssl->state->error = num;
    return ret;
}
#endif
OUT int SSL_read(struct ssl *ssl, void *buf, int num) {
    int ret = peek(ssl, buf, num);
    if (ret <= 0)
        return ret;
#ifdef CHECKED
    if ((size_t)ret > ssl->state->pending_bytes)
        abort();
#endif
    ssl->state->pending += ret;
    ssl->state->pending_bytes -= (size_t)ret;
    if (ssl->state->pending_bytes == 0 && ssl->state->buffered == 0) {
        free(ssl->state->buffer);
        ssl->state->buffer = NULL;
    }
    return ret;
}

ALWAYS int write_body(struct ssl *ssl, const void *buf, int num) {
    reset(ssl);
    if (ssl->quic != NULL) {
        REPORT(66);
        return -1;
    }
    if (ssl->do_handshake == NULL) {
        REPORT(226);
        return -1;
    }
    int ret = 0;
    size_t written = 0;
    char again = 0;
    do {
        if (!(ssl->state->flags & 8)) {
            ret = SSL_do_handshake(ssl);
            if (ret < 0)
                return ret;
            if (ret == 0) {
                REPORT(215);
                return -1;
            }
        }
        if (BAD_LENGTH && num < 0) {
            REPORT(BAD_LENGTH);
            return -1;
        }
        ret = ssl->method->write_app_data(ssl, &again, &written, buf, (size_t)num);
    } while (again);
    return ret <= 0 ? ret : (int)written;
}
OUT int SSL_write(struct ssl *ssl, const void *buf, int num) { return write_body(ssl, buf, num); }
#ifdef TWO_WRITERS
OUT int SSL_write_early(struct ssl *ssl, const void *buf, int num) {
    ssl->state->flags |= 16;
    return write_body(ssl, buf, num);
}
#endif

OUT int SSL_shutdown(struct ssl *ssl) {
    if (ssl->do_handshake == NULL) {
        REPORT(226);
        return -1;
    }
    if (ssl->state->flags & 2) {
        REPORT(291);
        return -1;
    }
    return ssl->method->open(ssl, NULL, 0);
}
OUT int SSL_set_tlsext_host_name(struct ssl *ssl, const char *name) {
    free(ssl->hostname);
    ssl->hostname = NULL;
    if (name == NULL)
        return 1;
    size_t length = strlen(name);
    if (length == 0 || length > 255) {
        REPORT(213);
        return 0;
    }
    ssl->hostname = strdup(name);
#ifdef OLD
    if (ssl->hostname == NULL) {
        REPORT(65);
        return 0;
    }
#endif
    return ssl->hostname != NULL;
}

#ifndef NO_CALLER
OUT int use(struct ssl *ssl, char *buf, int num, int what) {
    switch (what) {
    case 0: return 1 + SSL_read(ssl, buf, num);
    case 1: return 2 + SSL_write(ssl, buf, num);
    case 2: return 3 + SSL_set_tlsext_host_name(ssl, buf);
#ifdef TWO_WRITERS
    case 3: return 4 + SSL_write_early(ssl, buf, num);
#endif
#ifndef NO_PEEK
    case 5: return 6 + SSL_peek(ssl, buf, num);
#endif
#ifdef TWO_READERS
    case 6: return 7 + SSL_read_early(ssl, buf, num);
#endif
#ifdef PEEKS_LATER
    case 7: return 8 + BIO_pending(ssl, buf, num);
#endif
    default: return 5 + SSL_shutdown(ssl);
    }
}
#endif
#ifndef SHARED
int main(int argc, char **argv) {
    static struct ssl ssl;
#ifndef NO_CALLER
    return argc > 100 ? use(&ssl, argv[0], argc, argc - 100) : 0;
#else
    int (*volatile functions[])() = {SSL_read, SSL_write, SSL_set_tlsext_host_name, SSL_shutdown};
    return argc > 100 ? functions[argc & 3](&ssl, argv[0], argc) : 0;
#endif
}
#endif
