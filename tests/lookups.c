/* Preloaded into a process and all that it starts: writes a line for each name that is looked up
   and each address that is contacted on another machine to the file that LOOKUPS names. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what) {
  char line[600];
  int size = snprintf(line, sizeof line, "%.500s\n", what);
  int file = open(getenv("LOOKUPS"), O_WRONLY | O_APPEND | O_CREAT, 0600);
  if (file < 0 || write(file, line, size) != size) abort();
  close(file);
}

static void note_address(const struct sockaddr *address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address && address->sa_family == AF_INET)
    inet_ntop(AF_INET, &((const struct sockaddr_in *)address)->sin_addr, text, sizeof text);
  else if (address && address->sa_family == AF_INET6)
    inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)address)->sin6_addr, text, sizeof text);
  if (*text && strncmp(text, "127.", 4) && strcmp(text, "::1")) note(text);
}

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                struct addrinfo **result) {
  int (*really)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
      dlsym(RTLD_NEXT, "getaddrinfo");
  if (name && strncmp(name, "127.", 4) && strcmp(name, "localhost")) note(name);
  return really(name, service, hints, result);
}

int connect(int file, const struct sockaddr *address, socklen_t size) {
  int (*really)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
  note_address(address);
  return really(file, address, size);
}

ssize_t sendto(int file, const void *data, size_t count, int flags, const struct sockaddr *address,
               socklen_t size) {
  ssize_t (*really)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) =
      dlsym(RTLD_NEXT, "sendto");
  note_address(address);
  return really(file, data, count, flags, address, size);
}
