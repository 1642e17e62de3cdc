package marwright;

import io.netty.handler.codec.http.HttpHeaders;
import java.io.IOException;
import java.lang.invoke.MethodHandles;
import java.lang.invoke.VarHandle;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.time.Instant;
import java.util.concurrent.locks.ReentrantReadWriteLock;
import org.pytorch.serve.util.TokenAuthorization;
import org.pytorch.serve.util.TokenAuthorization.TokenType;

/**
 * Takes the one token that a gateway sends to all its servers for this server's inference token,
 * which TorchServe makes up and renews (org.pytorch.serve.util.TokenAuthorization).
 */
final class Gateway {
    /** How long before its end a token is renewed: TorchServe still has to look at it. */
    private static final long MARGIN_SECONDS = 1;

    /** Spelled as models' code looks for it; netty's own names are in small letters. */
    private static final String AUTHORIZATION = "Authorization";

    private static final byte[] HEADER = readHeader();
    private static final VarHandle TOKEN = find("inferenceKey", String.class);
    private static final VarHandle END = find("inferenceExpirationTimeMinutes", Instant.class);

    /** Shared by requests whose token has to stay what it is; held alone by those that renew it. */
    private static final ReentrantReadWriteLock LOCK = new ReentrantReadWriteLock();

    private Gateway() {}

    /** Return whether a request has the gateway's token, where tokens are asked for. */
    static boolean sent(HttpHeaders headers) {
        String given = headers.get(AUTHORIZATION);
        return given != null
                && HEADER.length > 0
                && TokenAuthorization.isEnabled()
                && MessageDigest.isEqual(given.getBytes(StandardCharsets.UTF_8), HEADER);
    }

    /** Give a request TorchServe's token, and pass it on before that can become another one. */
    static void admit(HttpHeaders headers, Runnable pass) {
        if (endsSoon()) {
            renew(Gateway::replaceToken);
        }
        LOCK.readLock().lock();
        try {
            headers.set(AUTHORIZATION, "Bearer " + (String) TOKEN.getVolatile());
            pass.run();
        } finally {
            LOCK.readLock().unlock();
        }
    }

    /** Do what may renew a token, while no request is under way to TorchServe with the old one. */
    static void renew(Runnable action) {
        LOCK.writeLock().lock();
        try {
            action.run();
        } finally {
            LOCK.writeLock().unlock();
        }
    }

    private static void replaceToken() {
        if (!endsSoon()) {
            return; // another thread was first
        }
        try {
            TokenAuthorization.updateKeyFile(TokenType.INFERENCE);
        } catch (IOException exc) {
            Settings.LOG.error("the new inference token cannot be written: {}", exc.toString());
        }
    }

    private static boolean endsSoon() {
        return Instant.now().plusSeconds(MARGIN_SECONDS).isAfter((Instant) END.getVolatile());
    }

    private static byte[] readHeader() {
        byte[] key = Settings.readKey(
                Settings.GATEWAY_KEY_FILE, "the gateway gets no answer: its token cannot be read");
        String header = "Bearer " + new String(key, StandardCharsets.UTF_8);
        return key.length == 0 ? key : header.getBytes(StandardCharsets.UTF_8);
    }

    private static VarHandle find(String field, Class<?> type) {
        try {
            return MethodHandles.privateLookupIn(TokenAuthorization.class, MethodHandles.lookup())
                    .findStaticVarHandle(TokenAuthorization.class, field, type);
        } catch (ReflectiveOperationException exc) {
            throw new ExceptionInInitializerError(exc);
        }
    }
}
