/* A stand-in for rustls' record layer: its struct, its two virtual calls, the panics around them.
 * Compiled by test_rustls.py with symbols, searched without them, and run by an emulator.
 *
 * Switches make what a finder must see through: INLINED (decrypt is in the connection's function),
 * HOISTED (its address is loaded before a loop), CHECKED (a number too large panics in another way,
 * as in older versions), SPLIT (what is seldom done is elsewhere, and comes back; GCC), OUTER (the
 * layer lies in another struct), WIDE_TAG (Ok is a number of 64 bits), TWICE (two rustls); and what
 * it must refuse: OTHER_BOX, NO_COUNT, ATOMIC, NO_CONN, NO_NAMES, UNSEEN (an encrypt without the
 * shape), MISSING (one connection has no decrypt). HOSTED: there is a C library. */

typedef unsigned long u64;
typedef unsigned char u8;
typedef unsigned short u16;
#define OUT __attribute__((noinline, visibility("default")))
#define INSIDE __attribute__((noinline, visibility("hidden")))
#define ALWAYS static inline __attribute__((always_inline))
#ifndef FOLDER
#define FOLDER "/home/builder/.cargo/registry/src/index.crates.io-0/rustls-0.23.40"
#endif
#ifdef WIDE_TAG
#define OK 0x8000000000000029ul
typedef u64 tag_type;
#else
#define OK 0xff
typedef u8 tag_type;
#endif
#define FAILED 6 /* Error::DecryptError */

struct location {
    const char *file;
    u64 length;
    unsigned line, column;
};
struct message {
    u64 several;
    const u8 *data;
    u64 length, end;
    u8 type, version;
};
struct result {
    tag_type tag;
    const u8 *data;
    u64 length;
    u8 type;
    u64 more;
};
struct table {
    void (*drop)(void *);
    u64 size, align;
    struct result (*run)(void *, struct message *, u64);
};
struct box {
    void *object;
    const struct table *table;
};
struct layer {
    u64 trial, left;
    struct box encrypter, decrypter;
    u64 write_max, write_seq, read_seq;
    u8 has_decrypted, encrypts, decrypts;
    u64 sent, received;
    const u8 *waiting;
    u64 waiting_bytes;
};

volatile u64 panicked;
__attribute__((noreturn)) INSIDE void panic(const char *text, u64 length, const struct location *where) {
    panicked = where->line + length + (u64)text;
    for (;;)
        ;
}
INSIDE void note(u64 what) { panicked += what; }
#ifdef SPLIT
__attribute__((cold)) INSIDE void seldom(u64 what) { panicked += what; }
#define SELDOM(l) if (__builtin_expect((l)->left == 12345, 0)) seldom((l)->left)
#else
#define SELDOM(l)
#endif

#define AT(folder, name, line, column) {folder name, sizeof(folder name) - 1, line, column}
#ifdef NO_NAMES
#undef AT
#define AT(folder, name, line, column) {"<redacted>", 10, line, column}
#endif

/* One copy of the crate: everything below, with another name. */
#define CRATE(folder, of)                                                                          \
    static const struct location of##_refused = AT(folder, RECORD_LAYER, 112, 9);                  \
    static const struct location of##_failed = AT(folder, RECORD_LAYER, 117, 14);                  \
    static const struct location of##_conn = AT(folder, CONN, 988, 57);                            \
    ENCRYPT(of) DECRYPT(of) SENDS(of) CONNECTION(of, 1) CONNECTION(of, 2)

#ifndef RECORD_LAYER
#define RECORD_LAYER "/src/record_layer.rs"
#endif
#ifdef NO_CONN
#define CONN "/src/other.rs"
#else
#define CONN "/src/conn.rs"
#endif
#ifdef OTHER_BOX
#define TABLE(l) (l)->decrypter.table
#else
#define TABLE(l) (l)->encrypter.table
#endif
#ifdef ATOMIC
#define COUNT(l) __atomic_fetch_add(&(l)->write_seq, 1, __ATOMIC_RELAXED)
#elif defined(NO_COUNT)
#define COUNT(l) (l)->write_seq
#else
#define COUNT(l) (l)->write_seq++
#endif
#ifdef CHECKED
#define REFUSED(l) ((l)->write_seq >= (u64)-2 && (l)->write_seq != (l)->write_max)
#else
#define REFUSED(l) ((l)->write_seq >= (u64)-2)
#endif

#define ENCRYPT(of)                                                                                \
    ALWAYS void of##_encrypt_into(struct layer *l, struct message *m, struct result *into) {       \
        if (REFUSED(l))                                                                            \
            panic("assertion failed", 16, &of##_refused);                                          \
        u64 seq = COUNT(l);                                                                        \
        *into = TABLE(l)->run(l->encrypter.object, m, seq);                                        \
        if (into->tag != OK)                                                                       \
            panic("called unwrap", 13, &of##_failed);                                              \
    }                                                                                              \
    INSIDE struct result of##_encrypt(struct layer *l, struct message *m) {                        \
        struct result r;                                                                           \
        of##_encrypt_into(l, m, &r);                                                               \
        l->sent += r.length;                                                                       \
        return r;                                                                                  \
    }

#define DECRYPT(of)                                                                                \
    ALWAYS int of##_decrypt_into(struct layer *l, struct message *m, struct result *into) {        \
        if (l->decrypts != 2)                                                                      \
            return 0;                                                                              \
        u64 seq = l->read_seq;                                                                     \
        SELDOM(l);                                                                                 \
        *into = l->decrypter.table->run(l->decrypter.object, m, seq);                              \
        if (into->tag == FAILED && l->trial && m->length <= l->left) {                             \
            l->left -= m->length;                                                                  \
            return 1;                                                                              \
        }                                                                                          \
        if (into->tag != OK)                                                                       \
            return -1;                                                                             \
        l->read_seq = seq + 1;                                                                     \
        if (!l->has_decrypted)                                                                     \
            l->has_decrypted = 1;                                                                  \
        return seq == 0xffff0000ul ? 2 : 3;                                                        \
    }                                                                                              \
    INSIDE int of##_decrypt(struct layer *l, struct message *m, struct result *into) {             \
        struct result r;                                                                           \
        int how = of##_decrypt_into(l, m, &r);                                                     \
        if (how >= 2)                                                                              \
            *into = r;                                                                             \
        return how;                                                                                \
    }

#ifdef UNSEEN
#define LAST_CALL(l, m) (l)->encrypter.table->run((l)->encrypter.object, m, 0)
#define UNSEEN_SEND(of)                                                                            \
    OUT void of##_send_unseen(struct layer *l, struct message *m) {                                \
        struct result r = LAST_CALL(l, m);                                                         \
        if (r.tag != OK)                                                                           \
            panic("called unwrap", 13, &of##_failed);                                              \
    }
#else
#define UNSEEN_SEND(of)
#endif

#define SENDS(of)                                                                                  \
    OUT u64 of##_send_one(struct layer *l, const u8 *data, u64 length, u8 type) {                  \
        struct message m = {0, data, length, 0, type, 4};                                          \
        return of##_encrypt(l, &m).length;                                                         \
    }                                                                                              \
    OUT u64 of##_send_all(struct layer *l, const u8 *data, u64 length, u64 most) {                 \
        u64 done = 0;                                                                              \
        while (length) {                                                                           \
            u64 now = length < most ? length : most;                                               \
            struct message m = {0, data, now, 0, 3, 4};                                            \
            struct result r;                                                                       \
            if (l->write_seq == l->write_max)                                                      \
                note(l->write_seq);                                                                \
            of##_encrypt_into(l, &m, &r);                                                          \
            l->sent += r.length;                                                                   \
            done += r.length, data += now, length -= now;                                          \
        }                                                                                          \
        return done;                                                                               \
    }                                                                                              \
    UNSEEN_SEND(of)

#if defined(INLINED)
#define RUN_DECRYPT(of) of##_decrypt_into
#elif defined(HOISTED)
#define RUN_DECRYPT(of) decrypt
#else
#define RUN_DECRYPT(of) of##_decrypt
#endif
#ifdef OUTER
struct connection {
    u64 kind;
    struct layer layer;
};
#define LAYER(c) (&(c)->layer)
#else
struct connection {
    struct layer layer;
};
#define LAYER(c) ((struct layer *)(c))
#endif
#ifdef MISSING
#define STEP(of, number, l, m, r) (number == 2 ? -1 : RUN_DECRYPT(of)(l, m, r))
#else
#define STEP(of, number, l, m, r) RUN_DECRYPT(of)(l, m, r)
#endif

/* As process_new_packets is compiled for each type of connection. */
#define CONNECTION(of, number)                                                                     \
    OUT u64 of##_process_##number(struct connection *c, const u8 *data, u64 records, u64 each) {   \
        struct layer *l = LAYER(c);                                                                \
        u64 done = 0;                                                                              \
        for (u64 at = 0; at < records; at++) {                                                     \
            struct message m = {each, data + at * each, each, number, 3, 4};                       \
            struct result r;                                                                       \
            if (each > 0x4000)                                                                     \
                panic("range end out of range", 22, &of##_conn);                                   \
            int how = STEP(of, number, l, &m, &r);                                                 \
            if (how < 0)                                                                           \
                break;                                                                             \
            if (how < 2)                                                                           \
                continue;                                                                          \
            done += r.length + r.type;                                                             \
            l->received += r.length;                                                               \
            l->waiting = r.data, l->waiting_bytes = r.length;                                      \
            note(number);                                                                          \
        }                                                                                          \
        return done;                                                                               \
    }

#if defined(HOISTED)
#undef CONNECTION
#define CONNECTION(of, number)                                                                     \
    OUT u64 of##_process_##number(struct connection *c, const u8 *data, u64 records, u64 each) {   \
        struct layer *l = LAYER(c);                                                                \
        int (*decrypt)(struct layer *, struct message *, struct result *) = of##_decrypt;          \
        u64 done = 0;                                                                              \
        __asm__ volatile("" : "+r"(decrypt));                                                      \
        for (u64 at = 0; at < records; at++) {                                                     \
            struct message m = {each, data + at * each, each, number, 3, 4};                       \
            struct result r;                                                                       \
            if (each > 0x4000)                                                                     \
                panic("range end out of range", 22, &of##_conn);                                   \
            int how = decrypt(l, &m, &r);                                                          \
            if (how < 0)                                                                           \
                break;                                                                             \
            if (how < 2)                                                                           \
                continue;                                                                          \
            done += r.length + r.type;                                                             \
            l->received += r.length;                                                               \
            note(number);                                                                          \
        }                                                                                          \
        return done;                                                                               \
    }
#endif

CRATE(FOLDER, one)
#ifdef TWICE
CRATE("/build/fork/crates/x-rustls/rustls", two)
#endif

const char rustls_label[] __attribute__((used)) = "c ap traffic";
void *const rustls_users[] __attribute__((used)) = {
    (void *)one_send_one, (void *)one_send_all, (void *)one_process_1, (void *)one_process_2,
#ifdef UNSEEN
    (void *)one_send_unseen,
#endif
#ifdef TWICE
    (void *)two_send_one, (void *)two_send_all, (void *)two_process_1, (void *)two_process_2,
#endif
};
#ifndef HOSTED
void _start(void) { note((u64)rustls_users[0]); }
void *memcpy(void *to, const void *from, u64 size) {
    for (u64 at = 0; at < size; at++)
        ((volatile u8 *)to)[at] = ((const u8 *)from)[at];
    return to;
}
void *memset(void *to, int value, u64 size) {
    for (u64 at = 0; at < size; at++)
        ((volatile u8 *)to)[at] = (u8)value;
    return to;
}
#endif
