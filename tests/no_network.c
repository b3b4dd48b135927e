// Preloaded, writes every look-up of a name and every address outside this machine that a process turns to into the
// file that STAGE1_OUTSIDE names, and refuses both.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void say(const char* what, const char* whom) {
    const char* path = getenv("STAGE1_OUTSIDE");
    int file = path ? open(path, O_WRONLY | O_CREAT | O_APPEND, 0600) : -1;
    if (file >= 0) {
        dprintf(file, "%d %s %s\n", (int)getpid(), what, whom ? whom : "-");
        close(file);
    }
}

static int outside(const struct sockaddr* to, char* text) {
    if (to->sa_family == AF_INET) {
        const struct in_addr* address = &((const struct sockaddr_in*)to)->sin_addr;
        inet_ntop(AF_INET, address, text, 64);
        return strncmp(text, "127.", 4) != 0;
    }
    if (to->sa_family == AF_INET6) {
        inet_ntop(AF_INET6, &((const struct sockaddr_in6*)to)->sin6_addr, text, 64);
        return strcmp(text, "::1") != 0;
    }
    return 0;
}

int getaddrinfo(const char* node, const char* service, const struct addrinfo* hints, struct addrinfo** found) {
    int (*real)(const char*, const char*, const struct addrinfo*, struct addrinfo**) = dlsym(RTLD_NEXT, "getaddrinfo");
    if (!node || !strcmp(node, "localhost") || !strncmp(node, "127.", 4) || !strcmp(node, "::1"))
        return real(node, service, hints, found);
    say("looks up", node);
    return EAI_FAIL;
}

int connect(int socket, const struct sockaddr* to, socklen_t size) {
    int (*real)(int, const struct sockaddr*, socklen_t) = dlsym(RTLD_NEXT, "connect");
    char text[64];
    if (!outside(to, text)) return real(socket, to, size);
    say("connects to", text);
    errno = ENETUNREACH;
    return -1;
}

ssize_t sendto(int socket, const void* data, size_t n, int flags, const struct sockaddr* to, socklen_t size) {
    ssize_t (*real)(int, const void*, size_t, int, const struct sockaddr*, socklen_t) = dlsym(RTLD_NEXT, "sendto");
    char text[64];
    if (!to || !outside(to, text)) return real(socket, data, n, flags, to, size);
    say("sends to", text);
    errno = ENETUNREACH;
    return -1;
}
