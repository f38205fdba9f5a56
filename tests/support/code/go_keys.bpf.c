/* Sends what a Go program's crypto/tls gives to (*Config).writeKeyLog, for test_keys_from_kernel.py:
 * label, client random, secret. Go calls it whether or not the program has a KeyLogWriter, with all of
 * it in registers (Go 1.17 and later). Built with -DTGID= for one process of the test's own. x86-64. */
#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <bpf/bpf_helpers.h>

struct line {
    __u64 label_length, random_length, secret_length;
    char label[64];
    unsigned char random[32], secret[64];
};
struct {
    __uint(type, BPF_MAP_TYPE_RINGBUF);
    __uint(max_entries, 1 << 20);
} ring SEC(".maps");

SEC("uprobe") int write_key_log(struct pt_regs *ctx) {
    if (bpf_get_current_pid_tgid() >> 32 != TGID)
        return 0;
    __u64 label = ctx->rcx, secret = ctx->r10;
    if (label > 64 || secret > 64 || ctx->rsi != 32)
        return 0;
    struct line *line = bpf_ringbuf_reserve(&ring, sizeof(*line), 0);
    if (!line)
        return 0;
    line->label_length = label;
    line->random_length = ctx->rsi;
    line->secret_length = secret;
    bpf_probe_read_user(line->label, label, (void *)ctx->rbx);
    bpf_probe_read_user(line->random, 32, (void *)ctx->rdi);
    bpf_probe_read_user(line->secret, secret, (void *)ctx->r9);
    bpf_ringbuf_submit(line, 0);
    return 0;
}
char LICENSE[] SEC("license") = "GPL";
