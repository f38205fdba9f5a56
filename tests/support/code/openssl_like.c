/* A stand-in for OpenSSL's ssl_lib.c and s3_lib.c: who calls whom, and which names are reported.
 *
 * Written for the tests, not taken from OpenSSL. OLD reports as 1.1.1 does, by numbers; FLAGS has
 * the extra argument of 3.3. The other macros make what must be refused: see test_openssl.py.
 */
#include <stddef.h>

#ifndef FOLDER
#define FOLDER ""
#endif
#ifndef SSL_LIB
#define SSL_LIB FOLDER "ssl/ssl_lib.c"
#endif
#define S3_LIB FOLDER "ssl/s3_lib.c"
#ifdef __clang__
#define APART __attribute__((noinline))
#else
#define APART __attribute__((noipa))
#endif

struct ssl {
	long (*read)(struct ssl *, void *, size_t, size_t *);
	long (*write)(struct ssl *, const void *, size_t, size_t *);
	void *host;
	volatile int state;
};

#ifdef OLD
APART void ERR_put_error(int library, int function, int reason, const char *file, int line)
{
	__asm__ volatile("" : : "r"(library), "r"(function), "r"(reason), "r"(file), "r"(line));
}
#define REPORT(number, name, reason, file) ERR_put_error(20, number, reason, file, __LINE__)
#else
APART void ERR_new(void) { __asm__ volatile(""); }
APART void ERR_set_debug(const char *file, int line, const char *function)
{
	__asm__ volatile("" : : "r"(file), "r"(line), "r"(function));
}
APART void ERR_set_error(int library, int reason, const char *format, ...)
{
	__asm__ volatile("" : : "r"(library), "r"(reason), "r"(format));
}
#define REPORT(number, name, reason, file) \
	(ERR_new(), ERR_set_debug(file, __LINE__, name), ERR_set_error(20, reason, NULL))
#endif

#ifdef FLAGS
#define WITH_FLAGS , unsigned long long flags
#define FLAGS_GIVEN , flags
#define NO_FLAGS , 0
#else
#define WITH_FLAGS
#define FLAGS_GIVEN
#define NO_FLAGS
#endif

APART static int ssl_read_internal(struct ssl *s, void *buffer, size_t length, size_t *done)
{
	if (s->state == 0) {
		REPORT(523, "ssl_read_internal", 276, SSL_LIB);
		return -1;
	}
	return (int)s->read(s, buffer, length, done);
}

APART static int ssl_write_internal(struct ssl *s, const void *buffer, size_t length WITH_FLAGS,
				    size_t *done)
{
	if (s->state == 0) {
		REPORT(524, "ssl_write_internal", 276, SSL_LIB);
		return -1;
	}
#ifdef FLAGS
	if (flags) {
		REPORT(524, "ssl_write_internal", 100, SSL_LIB);
		return -1;
	}
#endif
	return (int)s->write(s, buffer, length, done);
}

APART int SSL_read(struct ssl *s, void *buffer, int length)
{
	size_t done;
	if (length < 0) {
		REPORT(223, "SSL_read", 271, SSL_LIB);
		return -1;
	}
	int result = ssl_read_internal(s, buffer, (size_t)length, &done);
	return result > 0 ? (int)done : result;
}

APART int SSL_read_ex(struct ssl *s, void *buffer, size_t length, size_t *done)
{
#ifdef CHANGES_ARGUMENTS
	int result = ssl_read_internal(s, (char *)buffer + 8, length, done);
#else
	int result = ssl_read_internal(s, buffer, length, done);
#endif
	return result < 0 ? 0 : result;
}

#ifdef READS_TWICE /* one more that hands its arguments on: which of them is SSL_read_ex? */
APART int SSL_read_more(struct ssl *s, void *buffer, size_t length, size_t *done)
{
	int result = ssl_read_internal(s, buffer, length, done);
	return result < 0 ? 7 : result;
}
#endif

#ifdef NAMED_TWICE
APART int SSL_read_again(struct ssl *s, void *buffer, int length)
{
	if (length < 1) {
		REPORT(223, "SSL_read", 271, SSL_LIB);
		return -1;
	}
	return ssl_read_internal(s, buffer, (size_t)length, (size_t *)&s->host);
}
#endif

#ifndef NO_PLAIN_WRITE
APART int SSL_write(struct ssl *s, const void *buffer, int length)
{
	size_t done;
	if (length < 0) {
		REPORT(208, "SSL_write", 271, SSL_LIB);
		return -1;
	}
	int result = ssl_write_internal(s, buffer, (size_t)length NO_FLAGS, &done);
	return result > 0 ? (int)done : result;
}
#endif

#ifdef FLAGS
#ifndef NO_EX2
APART int SSL_write_ex2(struct ssl *s, const void *buffer, size_t length, unsigned long long flags,
			size_t *done)
{
	int result = ssl_write_internal(s, buffer, length, flags, done);
	return result < 0 ? 0 : result;
}
#endif
#ifndef NO_EX
APART int SSL_write_ex(struct ssl *s, const void *buffer, size_t length, size_t *done)
{
	int result = ssl_write_internal(s, buffer, length, 0, done);
	return result < 0 ? 0 : result;
}
#endif
#else
APART int SSL_write_ex(struct ssl *s, const void *buffer, size_t length, size_t *done)
{
	int result = ssl_write_internal(s, buffer, length, done);
	return result < 0 ? 0 : result;
}
#endif

APART long ssl3_ctrl(struct ssl *s, int command, long number, void *pointer)
{
	switch (command) { /* dense, so that it becomes a jump table */
	case 50: s->state = 1; return number;
	case 51: s->state += 2; return 1;
	case 52: s->state -= 3; return s->state;
	case 53: return s->state * 4;
	case 54: s->host = NULL; return 5;
	case 55:
		if (number != 0) {
			REPORT(213, "ssl3_ctrl", 320, S3_LIB);
			return 0;
		}
		s->host = pointer;
		return 1;
	case 56: s->state ^= 6; return 1;
	}
	return 0;
}

long (*const method_ctrl)(struct ssl *, int, long, void *) = ssl3_ctrl;

static long pass(struct ssl *s, void *buffer, size_t length, size_t *done)
{
	*done = length;
	return 1;
}

int main(int count, char **arguments)
{
	struct ssl s = {pass, (void *)pass, NULL, count};
	char buffer[64];
	size_t done = 0;
	long sum = method_ctrl(&s, 55, 0, arguments[0]);
	sum += SSL_read(&s, buffer, 64) + SSL_read_ex(&s, buffer, 64, &done);
#ifdef READS_TWICE
	sum += SSL_read_more(&s, buffer, 64, &done);
#endif
#ifdef NAMED_TWICE
	sum += SSL_read_again(&s, buffer, 64);
#endif
#ifndef NO_PLAIN_WRITE
	sum += SSL_write(&s, buffer, 64);
#endif
#if defined(FLAGS) && !defined(NO_EX2)
	sum += SSL_write_ex2(&s, buffer, 64, 0, &done);
#endif
#if !defined(FLAGS) || !defined(NO_EX)
	sum += SSL_write_ex(&s, buffer, 64, &done);
#endif
	return (int)sum + (int)done;
}
